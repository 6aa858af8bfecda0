"""GGUF files, llama.cpp's format, as `dcjax convert import` reads them: container, architecture, weights, tokenizer."""
