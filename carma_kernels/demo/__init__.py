"""The demo: a small GPT-2 learns inverse dictionary modelling with and without CARMA."""
