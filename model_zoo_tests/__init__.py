"""The model zoo: timm models with what must be found in each, and the suite over them."""
