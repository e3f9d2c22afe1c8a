"""One folder an operation: its inputs, a plain reference, the Triton kernel, and the dispatch between them."""
