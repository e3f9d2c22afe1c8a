"""What a caller of the kernels can get wrong."""


class KernelError(ValueError):
    """Arguments do not fit a kernel; the message names the argument, its value, what was expected and the remedy."""
