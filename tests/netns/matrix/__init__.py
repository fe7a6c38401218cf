"""A matrix of frames and switches: who must get each frame, and who must not.

``oracle`` says who gets a frame, ``pairwise`` chooses among combinations, ``cells`` names
the combinations and makes frames of them, ``site`` builds the switches and sends.
"""
