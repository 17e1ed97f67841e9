"""Distances between sets of images: FID, KID, Inception Score, precision and recall, copies."""
