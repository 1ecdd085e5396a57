"""The paper's network: arms, routers, the mix and its kernels, DiT, FuseDiT, codecs."""
