"""genpipe: two generations of DALL-E around one CLIP. Building blocks; the whole systems are in `pipelines`."""

__version__ = "0.1.0"
