"""Images as bits: lossless compression with a DDPM by bits-back coding, and the file that keeps them."""
