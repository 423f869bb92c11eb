"""What a GPU does otherwise than PyTorch alone; each part is tried at the start, on something small."""


class NotOnThisGpu(Exception):
    """This machine cannot do a part of it, or comes to other numbers; the message says why."""
