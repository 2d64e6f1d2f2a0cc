"""The systems put together from genpipe's blocks; the ways in are `pipelines.family.load_family` and the command."""
