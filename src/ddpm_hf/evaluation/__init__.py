"""What is measured: likelihood, calibration, and the results of both."""
