"""The source of x: a store harvested from a language model, or rows drawn from a known sparse dictionary."""
