"""The walk of all quantities: columns of cotangents, from the loss to the parameters."""
