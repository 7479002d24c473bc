"""What is in images: predictions of a trained model, and which tokens drove them."""
