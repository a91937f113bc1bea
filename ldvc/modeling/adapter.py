"""Text adapter: class embeddings that depend on the picture."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TextAdapter(nn.Module):
    """T_new = Linear_{2d->d}([T * V_g ; T]), ZegCLIP's relationship descriptor (Zhou et al., 2023).

    Args:
        width: d.
        start_at_identity: initialise the weight of T with the identity and that of T * V_g with zeros, so that T_new = T;
            otherwise PyTorch's initialisation, with which ZegCLIP's code starts, too.
    """

    def __init__(self, width: int, *, start_at_identity: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * width, width)
        if start_at_identity:
            with torch.no_grad():
                self.linear.weight.zero_()
                self.linear.weight[:, width:] = torch.eye(width)
                self.linear.bias.zero_()

    def forward(self, class_embeddings: Tensor, global_embedding: Tensor) -> Tensor:
        """Adapt each class embedding to each picture, in float32, because bfloat16 is too coarse for the product.

        Args:
            class_embeddings: T (C, d), L2-normalised.
            global_embedding: V_g (B, d), L2-normalised.

        Returns:
            T_new (B, C, d).
        """
        width = class_embeddings.shape[-1]
        with torch.autocast(class_embeddings.device.type, enabled=False):
            of_both, of_text = self.linear.weight.split(width, dim=1)  # (d, d) each
            product = class_embeddings.float()[None] * global_embedding.float()[:, None]  # (B, C, d)
            # the half of T is the same for every picture: computed once instead of B times
            alone = F.linear(class_embeddings.float(), of_text, self.linear.bias)  # (C, d)
            return F.linear(product, of_both) + alone
