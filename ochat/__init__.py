"""ochat: C-RLFT fine-tuning of Llama-family models on conversations of mixed quality."""

__version__ = "0.1.0"
