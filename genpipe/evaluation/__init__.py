"""Figures that say how good the parts are: reconstruction, retrieval, twin captions, best-of-N."""
