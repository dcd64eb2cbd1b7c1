"""From records to packed device batches, all through Grain. Knows no model."""
