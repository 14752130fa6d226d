"""The texts of `vicuna` in other languages than English."""
