"""From a recipe to finished artifacts: what it declares, what it needs, and how each stage is computed."""
