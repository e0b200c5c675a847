"""The parts of `dreambooth benchmark train`, and what its fast step should gain.

PREDICTED from counted operations and bytes, on an H100 at 800 TFLOP/s and 3 TB/s; 1 picture a step,
and 2 with prior preservation. Measured by nobody, as of 2026-11-23.

==============================  ===========================================================  =====
lever                           predicted                                                    where
==============================  ===========================================================  =====
latent posteriors cached        1.12 of 3.57 TFLOP per picture are gone (31 %)               plain
text embeddings cached          1.3 % of the FLOPs and about 300 launches are gone           plain
half weights, no autocast       3310 launches become 1841; activations move 12.7 GB instead  fast
                                of 26.6 (4.6 ms less), with prior 20.6 instead of 38.0 (5.8)
passes as one CUDA graph        1841 launches become 1: 60-120 ms of launching are gone,     fast
                                and the GPU's own 12-25 ms remain
unscale and clip in the cast,   42 bytes per parameter (norm 2, cast 6, AdamW 28, copy       fast
fused AdamW on fp32 masters     back 6): 12.1 ms, where autocast's passes take 54: 15.6 ms
losses read every 10 steps      the host prepares the next steps meanwhile; no figure        fast
convolutions channels_last      no transposes around tensor-core kernels; no figure          fast
floor of all these              15.1 ms, with prior 18.1 (goals 25 and 30)                   fast
8-bit AdamW besides             30 bytes per parameter: 8.7 ms, but launched one by one      fast
------------------------------  -----------------------------------------------------------  -----
AdamW on half gradients by a    30 bytes per parameter instead of 42: 3.5 ms less            not
kernel of our own                                                                            built
norm and AdamW in the graph     about 1500 launches a step fewer: some 8 ms of the host,     not
                                hidden while the GPU is the slower of the two                built
torch.compile                   cold it takes 1-3 minutes, more than 400 steps               not
                                                                                             built
==============================  ===========================================================  =====
"""
