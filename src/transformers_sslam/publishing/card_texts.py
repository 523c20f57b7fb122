"""What every model card has: examples of use by class, citations."""

DETECTOR = "SSLAMForAudioFrameClassification"
USAGE = {  # by class; of all others the encoder's
    "SSLAMForAudioClassification": """import transformers_sslam
from transformers import pipeline
from transformers_sslam.audio import load_waveform

classify = pipeline("audio-classification", model="{model_id}")
waveform = load_waveform("clip.wav", {sampling_rate})  # any format, rate and number of channels
print(classify({{"array": waveform, "sampling_rate": {sampling_rate}}}))""",
    DETECTOR: """import transformers_sslam
from transformers import AutoFeatureExtractor, AutoModelForAudioFrameClassification
from transformers_sslam.audio import load_waveform

extractor = AutoFeatureExtractor.from_pretrained("{model_id}")
model = AutoModelForAudioFrameClassification.from_pretrained("{model_id}").eval()
waveform = load_waveform("clip.wav", {sampling_rate})  # any format, rate, length and number of channels
print(model.detect(waveform, extractor))
# Transformers has no pipeline for this: "audio-classification" would take the layer for time steps for one for clips.""",
}
ENCODER_USAGE = """import torch
import transformers_sslam
from transformers import AutoFeatureExtractor, AutoModel
from transformers_sslam.audio import load_waveform

extractor = AutoFeatureExtractor.from_pretrained("{model_id}")
model = AutoModel.from_pretrained("{model_id}").eval()
waveform = load_waveform("clip.wav", {sampling_rate})  # any format, rate and number of channels
with torch.inference_mode():
    outputs = model(**extractor(waveform, sampling_rate={sampling_rate}, return_tensors="pt"))
outputs.pooler_output  # (batch, width): the clip
model.frame_embeddings(outputs.last_hidden_state)  # (batch, time, frequency, width): each 160 ms"""
CITATIONS = {
    "sslam": """@inproceedings{alex2025sslam,
  title     = {{SSLAM}: Enhancing Self-Supervised Models with Audio Mixtures for Polyphonic Soundscapes},
  author    = {Alex, Tony and Atito, Sara and Mustafa, Armin and Awais, Muhammad and Jackson, Philip J. B.},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2025},
  url       = {https://arxiv.org/abs/2506.12222}
}""",
    "eat": """@inproceedings{chen2024eat,
  title     = {{EAT}: Self-Supervised Pre-Training with Efficient Audio Transformer},
  author    = {Chen, Wenxi and Liang, Yuzhe and Ma, Ziyang and Zheng, Zhisheng and Chen, Xie},
  booktitle = {International Joint Conference on Artificial Intelligence (IJCAI)},
  year      = {2024},
  url       = {https://arxiv.org/abs/2401.03497}
}""",
}

REMOTE_CODE = (
    "The code that the model runs on lies beside the weights: without `import transformers_sslam`, load with `trust_remote_code=True`."
)
