"""Every leaf of a config with what it means; the other files say where they differ.

Any leaf can be overridden on the command line: --config.training.batch_size=64
"""

from ml_collections import ConfigDict, FieldReference, config_dict


def get_config() -> ConfigDict:
    """DDPM's hyperparameters for CIFAR-10."""
    config = ConfigDict()
    config.seed = 0
    config.init_from = ""  # weights that training begins with: a path as pretrained.load takes
    config.init_flags = ""  # what these do not say of themselves: a preset's name, OpenAI's flags, or JSON

    config.data = ConfigDict()
    config.data.dataset = "cifar10"  # a TFDS name, "folder" (images below data_dir) or "digits" (scikit-learn's)
    config.data.data_dir = ""  # TFDS's directory ("" for ~/tensorflow_datasets), or the folder of images
    # Whether a TFDS data set that is missing is downloaded and prepared. False on clusters whose nodes have no network.
    config.data.download = True
    config.data.split = "train"
    config.data.image_size = FieldReference(32, field_type=object)  # a number, or (height, width)
    config.data.channels = 3  # 3 for color, 1 for gray
    config.data.low_resolution = 0  # height of the smaller images that the model enlarges; 0 for none
    config.data.levels = 256  # how many values a channel can have; what likelihoods are of
    config.data.random_flip = True  # each image mirrored with probability one half
    config.data.memory_mb = 2048  # decoded once into memory where it fits, else streamed
    config.data.workers = 8  # processes that decode when streaming

    config.model = ConfigDict()  # the fields of models.UNet, or with the loss classify of models.Classifier
    config.model.channels = 128
    config.model.channel_multipliers = (1, 2, 2, 2)
    config.model.num_res_blocks = 2
    config.model.attention_levels = (1,)
    config.model.num_heads = 1
    config.model.num_heads_up = config_dict.placeholder(int)  # on the way up, where not as many
    config.model.head_channels = config_dict.placeholder(int)  # channels of a head, instead of num_heads
    config.model.resample_blocks = False  # ADM's residual blocks between levels, instead of convolutions
    config.model.scale_shift_norm = False
    config.model.embedding_cos_first = False
    config.model.embedding_freq_shift = 1.0
    config.model.downsample_padding = (0, 1)
    config.model.num_groups = 32
    config.model.norm_epsilon = 1e-6
    config.model.initializer = "ho"  # or "openai"
    config.model.dropout = 0.1
    config.model.num_classes = 0  # 0 for unconditional
    config.model.label_dropout = 0.0  # of the labels in training, for classifier-free guidance; 0.1 is usual
    config.model.out_channels = config_dict.placeholder(
        int
    )  # what data.channels and diffusion.variance need, unless given
    config.model.dtype = "float32"  # or "bfloat16": what the layers compute in
    # "xla", "products" (as matrix products), or "auto": products for bfloat16 on a CPU, else xla
    config.model.convolution = "auto"
    config.model.remat = False  # less memory, about a third more time

    config.diffusion = ConfigDict()
    config.diffusion.schedule = "linear"
    config.diffusion.num_timesteps = 1000
    config.diffusion.beta_start = 1e-4
    config.diffusion.beta_end = 0.02
    config.diffusion.prediction = "eps"  # eps, x_0, v, x_prev
    config.diffusion.rescale_timesteps = False  # the network sees t 1000 / T
    config.diffusion.variance = (
        "fixed_large"  # fixed_large, fixed_small; with the vlb or hybrid loss learned_range, learned
    )
    # simple, vlb (the variational bound), hybrid (both, for a learned variance), classify (a classifier for guidance)
    config.diffusion.loss = "simple"
    config.diffusion.vlb_weight = 0.001  # of the bound in the hybrid
    config.diffusion.conditioning_noise = 0.0  # of an upsampler: most standard deviation of noise on the smaller images
    config.diffusion.weighting = "none"  # none, snr, min_snr, truncated_snr, p2
    config.diffusion.timestep_sampler = "uniform"  # uniform, antithetic, stratified, loss_second_moment

    config.training = ConfigDict()
    config.training.num_steps = 800_000
    config.training.batch_size = 128  # of all devices together
    config.training.accumulation_steps = 1  # parts of the batch, worked one after the other: less memory, the same step
    config.training.steps_per_call = 1  # on accelerators, several steps in one program; CPUs make single calls
    config.training.deterministic = False  # on GPUs, the same numbers to the bit from run to run, at a price in speed
    config.training.log_every = 100
    config.training.sample_every = 10_000  # 0 for never
    config.training.checkpoint_every = 5_000
    config.training.checkpoints_kept = 3  # the newest ones
    config.training.checkpoint_keep_every = 100_000  # and every such step for good; 0 for none
    config.training.stall_timeout = 600.0  # seconds without a finished step that end the program; 0 for never
    config.training.profile = False  # traces five steps, soon after the start, for XProf

    config.optimizer = ConfigDict()
    config.optimizer.name = "adam"  # or adamw
    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup_steps = 5_000  # linear from 0
    config.optimizer.schedule = "constant"  # or "linear" or "cosine", to 0 at decay_steps
    config.optimizer.decay_steps = 800_000
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.0
    config.optimizer.grad_clip = 1.0  # of the global norm; 0 for none

    config.ema = ConfigDict()
    config.ema.decay = 0.9999
    config.ema.warmup = False  # min(decay, (1 + step) / (10 + step))

    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices that split the batch; -1 for all that fsdp leaves
    config.mesh.fsdp = 1  # devices that split the batch, and parameters, optimizer state and EMA too

    config.sampling = ConfigDict()
    # ddpm, ddim, euler, euler_ancestral, heun, dpm_solver_pp, unipc, deis, pndm, plms
    config.sampling.sampler = "ddpm"
    # All of diffusion.num_timesteps unless given: a number, spread as `spacing` says. With the spacing "openai" also several,
    # (10, 15, 20), one for each section of the chain; with "given" the network times themselves, rising.
    config.sampling.steps = FieldReference(None, field_type=object)
    # leading, trailing, linspace, quadratic, karras, log_snr, gaussian, openai, openai_ddim (its "ddim50"), given. Unless
    # given, what suits the sampler: log_snr for heun, pndm and plms, else trailing.
    config.sampling.spacing = config_dict.placeholder(str)
    config.sampling.eta = 0.0  # of ddim: 0 deterministic, 1 ancestral
    config.sampling.order = 2  # of dpm_solver_pp, unipc, deis: 1, 2, 3
    config.sampling.lower_order_final = True  # of those
    config.sampling.variant = "bh2"  # of unipc: bh1, bh2
    config.sampling.singlestep = False  # of dpm_solver_pp
    config.sampling.sde = False  # of dpm_solver_pp
    config.sampling.churn = 0.0  # of heun: EDM's S_churn
    config.sampling.churn_range = ()  # and the noise levels sigma (low, high) at which it churns; () for all
    config.sampling.churn_noise = 1.0  # and its S_noise
    config.sampling.clip = FieldReference(
        True, field_type=object
    )  # x_0 to [-1, 1] at every step; or False, or "dynamic"
    config.sampling.clip_quantile = 0.995  # of the dynamic threshold
    # Of a conditional model, or with a classifier: None for all classes in turn, a class by its number or name, or
    # several in turn: "(3,5)", "(cats,dogs)".
    # --config.sampling.class is read as this: the word is Python's own.
    config.sampling.label = FieldReference(None, field_type=object)
    config.sampling.guidance_scale = 1.0  # classifier-free, with model.label_dropout: 1 is none, 0 unconditional
    config.sampling.guidance_interval = ()  # the network times (low, high) at which it applies; () for all
    config.sampling.guidance_rescale = 0.0  # to 1, against the glare of a large scale
    config.sampling.classifier = ""  # that guides: its work directory, or a path as pretrained.load takes
    config.sampling.classifier_flags = ""
    config.sampling.classifier_scale = 1.0
    config.sampling.classifier_form = "eps"  # shifts eps; or "mean", ADM's, of the sampler ddpm
    config.sampling.low_resolution = ""  # what an upsampler enlarges: an .npz of --mode=sample, or a folder of images
    config.sampling.low_resolution_noise = 0.0  # how noisy these are said to be, with diffusion.conditioning_noise
    config.sampling.num_samples = 64
    config.sampling.batch_size = 64
    config.sampling.seed = 0
    config.sampling.use_ema = True
    config.sampling.progress = False  # shows the steps inside a batch, too; compiles anew at every launch
    config.sampling.trajectory = 0  # columns of the picture from noise to image; 0 for none
    config.sampling.preview_samples = 16  # of the pictures during training, made by DDIM
    config.sampling.preview_steps = 25

    config.editing = ConfigDict()  # --mode=edit; the sampler is that of `sampling`
    # inpaint (RePaint), replace (its simple form), sdedit, colorize, super_resolution, interpolate
    config.editing.task = "inpaint"
    config.editing.image = ""  # the file to edit
    config.editing.mask = ""  # of inpaint and replace: an image, white where pixels are known
    config.editing.other = ""  # of interpolate: the second image
    config.editing.num_samples = 8  # results; of interpolate: images from one to the other, ends included
    config.editing.resamplings = 10  # of inpaint
    config.editing.jump = 10  # of inpaint
    config.editing.strength = 0.5  # of sdedit: 0 to 1, how much may change
    config.editing.factor = 4  # of super_resolution
    # Of interpolate: None mixes encoded noise (for deterministic samplers); an index of the steps, noised images there.
    config.editing.level = config_dict.placeholder(int)

    config.evaluation = ConfigDict()
    config.evaluation.split = "test"
    config.evaluation.data_dir = ""  # where that split lies, if not in data.data_dir: for a folder, which has no splits
    config.evaluation.num_examples = 0  # the first ones of the split; 0 for all
    config.evaluation.batch_size = 64
    # Of the bound: None visits every timestep of every image; a number S, L_0 and two timesteps in each of S parts.
    config.evaluation.strata = FieldReference(None, field_type=object)
    config.evaluation.cdf = "exact"  # or "tanh", OpenAI's approximation
    config.evaluation.clip = True  # x_0 to [-1, 1], as in Ho's and OpenAI's figures
    config.evaluation.seed = 0
    config.evaluation.use_ema = True
    config.evaluation.ode = False  # also the likelihood of the probability-flow ODE
    config.evaluation.ode_dequantization = "uniform"  # or "variational"
    config.evaluation.ode_trace = "hutchinson"  # or "exact", as many derivatives as an image has numbers
    config.evaluation.ode_tolerance = 1e-5
    config.evaluation.likelihood = True  # whether --mode=evaluate measures the bound
    config.evaluation.num_samples = 50_000  # drawn as `sampling` says, and judged by --mode=evaluate; 0 for none
    config.evaluation.features = ""  # inception ("" but for the digits), digits, or module:function: images -> features
    config.evaluation.inception = ""  # Inception's weights: a .pth or the TensorFlow graph; "" judges no samples
    config.evaluation.resize = (
        "tf1"  # to Inception's 299 pixels: tf1 (FID), pytorch (pytorch-fid's), clean (clean-fid's)
    )
    config.evaluation.metrics = ("fid", "sfid", "kid", "is", "precision_recall", "density_coverage", "memorization")
    config.evaluation.reference_split = ""  # what samples are compared with; "" for data.split
    config.evaluation.every = 0  # steps of training after which FID is logged, of fewer samples; 0 for never
    config.evaluation.every_samples = 1000
    config.evaluation.progressive_examples = 64  # images of --mode=progressive
    config.evaluation.progressive_columns = 12  # of its pictures
    return config
