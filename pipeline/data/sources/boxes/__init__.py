"""Images with boxes: rows of a list, and COCO's annotations as they are distributed."""
