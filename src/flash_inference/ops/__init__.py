"""HOW: tensors in, tensors out. One folder per mathematical operation; none of them knows positions or time."""
