"""From noise to images: samplers, guidance, TextToImage."""
