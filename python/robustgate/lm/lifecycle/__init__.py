"""An expert's life in a modular system: how it comes in, and how it is taken out with proof."""
