"""llmpipe fine-tunes Llama-family models as a declarative pipeline of files."""

__version__ = "0.1.0"
