"""The networks (part II): text encoder, autoencoder and UNet, alternative forward passes, and every known model as
data.

Plain tensors in and out. The names of weights in files are in files/, faster implementations in speed/.
"""
