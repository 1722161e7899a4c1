"""Where x comes from: harvested from a language model into a store, or drawn from a known sparse dictionary."""
