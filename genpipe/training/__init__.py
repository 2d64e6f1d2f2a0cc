"""One accelerate loop for every trained part: recipes (dataclasses), stages (batch -> loss), exact resume."""
