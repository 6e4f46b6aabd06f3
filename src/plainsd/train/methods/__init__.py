"""What is trained, a file a method: which weights move, and by which loss.

The loop around them is train/loop.py, and how a run is put together train/from_scratch.py and train/from_model.py.
"""
