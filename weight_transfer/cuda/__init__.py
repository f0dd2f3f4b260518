"""The weight plane's CUDA kernels, compiled at first use. Imported only where tensors are on a CUDA device."""
