"""Bundles, state, preprocessing and one module an engine; numpy alone until an engine or OpenCV is used."""
