"""What calibration data tells: batches, what flows into and out of layers, and the error of one model against another."""
