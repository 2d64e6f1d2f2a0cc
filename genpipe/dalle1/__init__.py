"""DALL-E 1 (Ramesh et al. 2021, arXiv 2102.12092): discrete VAE, text-and-image transformer, sampling."""
