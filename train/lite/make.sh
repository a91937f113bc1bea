#!/usr/bin/env bash
# Makes everything under assets/lite anew: towers, then the three decoders. Each step goes on where it was stopped.
#   bash train/lite/make.sh DATA WORK
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
data=${1:-data}
work=${2:-runs/lite_recipe}

OMP_NUM_THREADS=1 python -m train.lite.stem_cache --data "$data" --work "$work" &
stem=$!
trap 'kill "$stem" 2>/dev/null || true' EXIT
OMP_NUM_THREADS=1 python -m train.lite.text_targets --work "$work"
OMP_NUM_THREADS=1 python -m train.lite.text_tower --work "$work" --minutes 15
wait "$stem"
python -m train.lite.image_tower --data "$data" --work "$work" --minutes 90
python -m train.lite.build --work "$work" --output assets/lite/clip

train_arms() { # CONFIG FOLDER DATA [CHANGES], then scores are calibrated
  for arm in ldvc ldvc_without_lcsa zegclip; do
    accelerate launch --cpu --num_processes 1 train/train.py --config "$1" --arm "$arm" --data "$3" \
      --output_dir "$2/$arm" --cache_dir "$work/cache" --resume_from_checkpoint latest ${4:+--set "$4/$arm"}
  done
  python train/evaluate.py --checkpoint "$2"/{ldvc,ldvc_without_lcsa,zegclip} --data "$data" --sets msrc coco-mini \
    --clip_arm lite --cache_dir "$work/cache" --calibrate
}
train_arms lite_release "$work/release" "$data"
# The second stage also learns from photos of which only a label is known.
python -m train.lite.pseudo_masks --data "$data" --work "$work" --decoder "$work/release/ldvc"
mkdir -p "$work/data"
for set in msrc coco-mini clothing facade camvid; do ln -sfn "$(realpath "$data")/$set" "$work/data/$set"; done
ln -sfn "$(realpath "$work")/pseudo" "$work/data/pseudo"
train_arms lite_release_labels "$work/final" "$work/data" "init_from=$work/release"
python -m train.lite.publish --release "$work/final" --output assets/lite
