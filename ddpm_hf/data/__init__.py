"""Images of a data set: finding, decoding, batches, streams."""
