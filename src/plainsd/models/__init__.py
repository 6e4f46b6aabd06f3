"""The networks (part II): text encoder, autoencoder and UNet, other ways through them, and every known model as data.

Plain tensors in and out. How files spell a network's weights is told in files/, what makes it faster in speed/.
"""
