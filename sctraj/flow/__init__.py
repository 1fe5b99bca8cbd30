"""Flow matching itself: tensors in, small named records out."""
