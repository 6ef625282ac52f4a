"""``sacl-fast finetune``: all weights of a trained encoder, trained on labelled images."""
