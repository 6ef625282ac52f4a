"""Operators, one file each: the plain PyTorch reference, faster backends, the public function."""
