"""DALL-E 2 (Ramesh et al. 2022, arXiv 2204.06125): prior, diffusion decoder and upsamplers around CLIP's embeddings."""
