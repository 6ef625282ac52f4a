"""An evaluation from settings to a result: images, features of each encoder, scores.

All methods work on the features of whole images (no augmentation), which every encoder computes
once. A trained encoder has the batch-norm statistics that its run estimated at the end, where those
are known, else statistics estimated from the images at hand, as the untrained one has.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sacl_fast.checks import counted
from sacl_fast.config import Config, ViewsConfig, to_dict
from sacl_fast.config.evaluation import (
    Evaluation,
    FewShotEvaluation,
    KnnEvaluation,
    LinearEvaluation,
)
from sacl_fast.data.images.given import Given
from sacl_fast.data.images.open import open_sources
from sacl_fast.data.images.root import refuse_among_images
from sacl_fast.data.loading.evaluation import EvalLoader
from sacl_fast.engine.distributed import pick_device
from sacl_fast.engine.preflight import check_run
from sacl_fast.engine.run_folder import CONFIG, ENCODER, METRICS
from sacl_fast.errors import UserError, reason_of
from sacl_fast.evaluation.evaluate import first_images
from sacl_fast.evaluation.features import extract_features
from sacl_fast.evaluation.few_shot import few_shot_accuracies, less_than_one, short_of
from sacl_fast.evaluation.images import (
    ChosenImages,
    choose_images,
    require_classes,
    require_per_class,
)
from sacl_fast.evaluation.knn import knn_predictions
from sacl_fast.evaluation.linear import fit_linear
from sacl_fast.evaluation.named_images import require_images
from sacl_fast.evaluation.networks import Batches, GivenEncoder, Network, networks_of
from sacl_fast.evaluation.progress import EvaluationProgress
from sacl_fast.evaluation.protocol import STATE, remove_state, top_of, train_layers
from sacl_fast.evaluation.report import write_result
from sacl_fast.evaluation.scores import METHODS, Result, Scores, classified, mean_of
from sacl_fast.evaluation.trained import Trained
from sacl_fast.files import shown_names, user_path
from sacl_fast.precision import autocast_dtype

logger = logging.getLogger(__name__)

_Features = tuple[Tensor, Tensor]  # (N, F), labels (N,)


def evaluate_trained(
    trained: Trained,
    settings: Evaluation,
    *,
    write: bool = True,
    quiet: bool = False,
    given: Given | None = None,
) -> Result:
    """Evaluate what ``open_trained`` found.

    Args:
        write: the result into the run folder, where ``settings.out`` names no other.
        quiet: no progress.
        given: images from Python in place of those that the settings name.

    Raises:
        UserError: before any work, where the images, their labels, the settings or the folder of
            the results do not allow it.
    """
    if given is None or given.source is None:
        require_images(trained, settings.data)
    device = pick_device(settings.device)
    folder = (trained.folder or trained.path.parent) / "eval" if write else None
    if settings.out is not None:
        folder = user_path(settings.out, "out")

    def networks(batches: Batches) -> list[Network]:
        return networks_of(trained, settings, device, batches)

    run, path = trained.config, str(trained.path)
    return _evaluate(networks, run, settings, device, folder, path, quiet, given)


def evaluate_module(
    encoder: nn.Module,
    views: ViewsConfig,
    settings: Evaluation,
    *,
    quiet: bool = True,
    given: Given | None = None,
) -> Result:
    """Evaluate a module (N, 3, S, S) -> (N, F) as it is, in eval mode, on the device that it is on;
    there is no control. The result is written where ``settings.out`` says."""
    network = GivenEncoder(encoder)
    folder = None if settings.out is None else user_path(settings.out, "out")
    config = replace(Config(), views=views)
    flags = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        return _evaluate(
            lambda _: [Network("dense", lambda: network, views)],
            *(config, settings, network.device, folder, type(encoder).__name__, quiet, given),
        )
    finally:
        for module, training in flags:
            module.training = training


def _evaluate(
    networks: Callable[[Batches], list[Network]],
    run: Config,
    settings: Evaluation,
    device: torch.device,
    folder: Path | None,
    path: str,
    quiet: bool,
    given: Given | None,
) -> Result:
    config = replace(
        run,
        **dict(out=None, resume="never", seed=settings.seed, device=settings.device),
        **dict(data=settings.data, eval=settings.eval, precision=settings.precision),
    )
    check_run(config)
    given = given or Given()
    if folder is not None:
        if given.source is None:
            refuse_among_images(folder, config.data)
        _check_folder(folder)
    amp_dtype = autocast_dtype(config.precision, device)
    splits = open_sources(config.data, config.seed, given=given)
    own = isinstance(settings, KnnEvaluation)
    images = choose_images(
        splits,
        config.seed,
        train=config.eval.bank if own else None,
        test=config.eval.queries if own else None,
    )
    _check_images(images, settings)
    note = ""
    if isinstance(settings, FewShotEvaluation):
        labels = images.train.labels[images.train_index]
        note = less_than_one(labels, settings.percent, images.train.classes)
    if note:
        logger.warning("%s", note)

    def training_images() -> Iterator[Tensor]:
        loader = EvalLoader(images.train, images.train_index, config, device)
        return first_images(loader, config.eval.recalibrate_batches, device)

    compared = networks(training_images)
    with (
        written_to(folder),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        EvaluationProgress(quiet=quiet) as progress,
    ):
        scores: list[Scores] = []
        counts = 0, 0
        if isinstance(settings, LinearEvaluation) and not settings.fast:
            scores, counts = _by_protocol(
                *(compared, images, settings, config, device, amp_dtype, folder, progress)
            )
            compared = []
        for network in compared:
            config = replace(config, views=network.views)
            train, test, readable = _features(network, images, config, device, amp_dtype, progress)
            if isinstance(settings, FewShotEvaluation) and not scores:
                note = _with_short_classes(note, train[1], images, settings)
            counts = len(train[1]), len(test[1])
            scores.append(_scores(network, train, test, readable, images, settings, progress))
        result = Result(
            method=method_of(settings),
            main=_main(settings),
            scores=tuple(scores),
            classes=tuple(images.train.classes),
            train_images=counts[0],
            test_images=counts[1],
            held_out=splits.val is None,
            settings=to_dict(settings),
            path=path,
            folder=folder,
            note=note,
        )
        if folder is not None:
            write_result(result, folder)
            if result.method == "linear":
                remove_state(folder)
    return result


def method_of(settings: Evaluation) -> str:
    """What the result is called, and its files."""
    if isinstance(settings, LinearEvaluation):
        return "linear-fast" if settings.fast else "linear"
    return "few-shot" if isinstance(settings, FewShotEvaluation) else "knn"


def _main(settings: Evaluation) -> str:
    few_shot = isinstance(settings, FewShotEvaluation)
    return f"{settings.per_class[-1]} per class" if few_shot else "top-1"


def _check_images(images: ChosenImages, settings: Evaluation) -> None:
    require_classes(images, "data.limit, eval.bank")
    count = len(images.train_index)
    if isinstance(settings, KnnEvaluation) and settings.eval.k > count:
        raise UserError(
            f"eval.k is {settings.eval.k}, but there are only "
            f"{counted(count, 'training image')} to choose "
            f"neighbours from; at most {count:,} works"
        )
    if isinstance(settings, FewShotEvaluation):
        require_per_class(images, max(settings.per_class))


def _check_folder(folder: Path) -> None:
    """Refuse a folder of something else, such as of images, which results would spoil."""
    ours = {f"{method}.json" for method in METHODS} | {STATE, CONFIG, METRICS, ENCODER}
    there = shown_names(folder)
    if there and not there & ours:
        raise UserError(
            f"{folder} is not empty and holds neither results nor a run; --out names another folder"
        )


def _by_protocol(
    networks: list[Network],
    images: ChosenImages,
    settings: LinearEvaluation,
    config: Config,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    folder: Path | None,
    progress: EvaluationProgress,
) -> tuple[list[Scores], tuple[int, int]]:
    """Scores of layers that are trained on augmented images, and how many images there were."""
    layers = train_layers(
        *(networks, images, settings, config, device, amp_dtype, folder, progress)
    )
    scores, count, classes = [], 0, len(images.train.classes)
    for layer in layers:
        network = layer.network
        loader = EvalLoader(
            images.test, images.test_index, replace(config, views=network.views), device
        )
        title = f"{network.name}: {counted(len(images.test_index), 'validation image')}"
        features, labels = extract_features(
            layer.encoder,
            progress.over(loader, title, len(loader)),
            device=device,
            amp_dtype=amp_dtype,
        )
        top, count = top_of(layer, features), len(labels)
        scores.append(classified(network.name, top, labels, classes, control=network.control))
    return scores, (len(images.train_index), count)


def _features(
    network: Network,
    images: ChosenImages,
    config: Config,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    progress: EvaluationProgress,
) -> tuple[_Features, _Features, np.ndarray]:
    """Of the training images, of those to be classified, and which of the former (N,) could be
    read."""
    encoder = network.build()
    found = []
    for title, source, index in (
        ("training", images.train, images.train_index),
        ("validation", images.test, images.test_index),
    ):
        loader = EvalLoader(source, index, config, device)
        title = f"{network.name}: features of {counted(len(index), f'{title} image')}"
        features = extract_features(
            encoder,
            progress.over(loader, title, len(loader)),
            device=device,
            amp_dtype=amp_dtype,
        )
        found.append((features, ~np.isin(index, list(loader.bad))))
    (train, readable), (test, _) = found
    return train, test, readable


def _scores(
    network: Network,
    train: _Features,
    test: _Features,
    readable: np.ndarray,
    images: ChosenImages,
    settings: Evaluation,
    progress: EvaluationProgress,
) -> Scores:
    name, control, classes = network.name, network.control, len(images.train.classes)
    if not all(features.isfinite().all() for features, _ in (train, test)):
        raise UserError(f"some features of the encoder ({name}) are not finite")
    if isinstance(settings, KnnEvaluation):
        top = knn_predictions(
            *(*train, *test),
            k=settings.eval.k,
            temperature=settings.eval.temperature,
            num_classes=classes,
        )
        return classified(name, top, test[1], classes, control=control)
    if isinstance(settings, LinearEvaluation):
        decays = settings.weight_decays
        tell = progress.steps(f"{name}: linear classifiers", len(decays) + 1)
        found = fit_linear(*train, classes, decays, seed=settings.seed, tell=tell)
        top, note = found.top(test[0]), f"weight decay {found.decay:g}"
        return classified(name, top, test[1], classes, control=control, note=note)
    assert isinstance(settings, FewShotEvaluation)
    kinds = len(settings.per_class) + len(settings.percent)
    accuracies = few_shot_accuracies(
        *(train, test, classes),
        per_class=settings.per_class,
        percent=settings.percent,
        draws=settings.draws,
        decays=settings.weight_decays,
        seed=settings.seed,
        tell=progress.steps(f"{name}: draws", kinds * settings.draws),
        among=(images.train.labels[images.train_index], readable),
    )
    figures = {name: mean_of(samples) for name, samples in accuracies.items()}
    return Scores(name, figures, accuracies[_main(settings)], control=control)


def _with_short_classes(
    note: str, labels: Tensor, images: ChosenImages, settings: FewShotEvaluation
) -> str:
    """The note, with what ``labels`` of the readable images lack."""
    there = labels.cpu().numpy()
    lacking = short_of(there, max(settings.per_class), images.train.classes)
    if lacking:
        logger.warning("%s", lacking)
    return ". ".join(part for part in (note, lacking) if part)


@contextlib.contextmanager
def written_to(folder: Path | None) -> Iterator[None]:
    """Have the folder, and know before the work that it can be written; where nothing came of it,
    it is gone again."""
    if folder is None:
        yield
        return
    made = not folder.exists()
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"can be written")
        except OSError as error:
            raise UserError(
                f"cannot write results to {folder}: {reason_of(error)}; --out names another folder"
            ) from error
        yield
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
