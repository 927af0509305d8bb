"""The engine behind `curvelora eval --task`: a fixed plan of batches, a journal of what is done, one predictor a protocol."""
