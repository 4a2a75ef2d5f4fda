"""Training, quantization and parity for any module: it is handed models and data, and imports none."""
