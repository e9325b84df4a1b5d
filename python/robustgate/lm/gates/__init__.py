"""Gates: how one is described, fitted to a store, distilled, and applied."""
