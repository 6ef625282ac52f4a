"""The supplement's listing of the loss, one line each, with the variants of the design: the oracle
of the loss's tests, in the type of its inputs."""

import torch

ALPHA, LAMBDA, GAMMA = 0.9, 0.02, 0.003
SETTINGS = {"alpha": ALPHA, "lambda_": LAMBDA, "gamma": GAMMA}


def pseudocode(
    z1,
    z2,
    z1_t=None,
    z2_t=None,
    *,
    distillation="correlation",
    off_diagonal="squared",
    pairing="same_width",
    variance="biased",
):
    def norm(z):
        if variance == "unbiased":
            return (z - z.mean(0)) / z.std(0)
        return (z - z.mean(0)) / torch.sqrt(z.var(0, unbiased=False) + 1e-5)

    def correlation(p, q):
        return norm(p).T @ norm(q) / len(p)

    def off(c, power):
        return (c - torch.diag(torch.diag(c))).pow(power).sum()

    c = correlation(z1, z2)
    contrastive = (torch.diag(c) - 1).pow(2).sum() + LAMBDA * off(c, 2)
    if distillation == "none":
        return contrastive
    if pairing == "cross_width":
        z1_t, z2_t = z2_t, z1_t
    if distillation == "log":
        terms = [
            -(t.softmax(1) * z.log_softmax(1)).sum(1).mean() for z, t in [(z1, z1_t), (z2, z2_t)]
        ]
        return contrastive + GAMMA * sum(terms) / 2
    power = 2 if off_diagonal == "squared" else 1
    distilled = LAMBDA / 2 * (off(correlation(z1, z1_t), power) + off(correlation(z2, z2_t), power))
    return ALPHA * contrastive + (1 - ALPHA) * distilled


def embeddings(n, d, dtype=torch.float64, device="cpu", seed=0):
    """z1 and z2 with gradient, correlated as in training, and their targets."""
    generator = torch.Generator().manual_seed(seed)
    zs = [torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(4)]
    zs[1] = 0.7 * zs[0] + zs[1]
    return [z.to(device, dtype).requires_grad_(i < 2) for i, z in enumerate(zs)]


def in_float64(zs):
    """Their exact copies, as leaves."""
    return [z.detach().double().requires_grad_(z.requires_grad) for z in zs]


def relative_errors(loss, zs, exact, exact_zs):
    """Of the value and of both gradients (norm of the difference over norm)."""
    loss.backward()
    exact.backward()
    pairs = [(loss.detach(), exact.detach())]
    pairs += [(z.grad, e.grad) for z, e in zip(zs[:2], exact_zs[:2], strict=True)]
    return [((a.double() - b.double()).norm() / b.norm()).item() for a, b in pairs]
