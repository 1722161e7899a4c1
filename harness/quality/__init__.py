"""What the features of a finished SAE are worth: one file per metric, one registry (`harness.quality.registry`)."""
