"""GGUF files, llama.cpp's format: read, checked, and written again as Hugging Face folders by `dcjax convert import`."""
