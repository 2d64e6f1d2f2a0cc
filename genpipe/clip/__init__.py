"""CLIP (arXiv 2103.00020): the one model that embeds text and pictures, its loss, and reranking with it."""
