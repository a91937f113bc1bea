#!/usr/bin/env bash
# Makes everything in assets/lite: the towers, then the three decoders, then both tuned together. Every step resumes after an
# interruption.
#   bash recipes/lite/make.sh DATA WORK
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
data=${1:-data}
work=${2:-runs/lite_recipe}

OMP_NUM_THREADS=1 python -m recipes.lite.stem_cache --data "$data" --work "$work" &
cache=$!
trap 'kill "$cache" 2>/dev/null || true' EXIT
OMP_NUM_THREADS=1 python -m recipes.lite.text_targets --work "$work"
OMP_NUM_THREADS=1 python -m recipes.lite.text_tower --work "$work" --minutes 15
wait "$cache"
python -m recipes.lite.image_tower --work "$work" --minutes 90
python -m recipes.lite.build --work "$work" --output assets/lite/clip

# Masks for photos of the image tower
OMP_NUM_THREADS=1 python -m recipes.lite.teacher_masks --data "$data" --work "$work"
mkdir -p "$work/data"
for set in msrc coco-mini clothing facade camvid; do ln -sfn "$(realpath "$data")/$set" "$work/data/$set"; done
for set in teacher-scenes teacher-objects teacher-rare; do ln -sfn "$(realpath "$work")/$set" "$work/data/$set"; done

for decoder in ldvc ldvc_without_lcsa zegclip; do
  python train/train.py --config lite_release_teacher --decoder "$decoder" --data "$work/data" \
    --output_dir "$work/release/$decoder" --cache_dir "$work/cache" --resume_from_checkpoint latest
done
config=$(python -c 'import torch; print("lite_tune_gpu" if torch.cuda.is_available() else "lite_tune")')
python -m recipes.lite.tune_tower --config "$config" --data "$work/data" --decoders "$work/release" --output "$work/tuned"
python -m recipes.lite.object_masks --data "$data" --output "$work/objects" --per_label 10
cp "$work/objects/object_words.json" recipes/lite/
for set in objects-0 objects-1 objects-2 objects-val; do ln -sfn "$(realpath "$work")/objects/$set" "$work/data/$set"; done
for decoder in ldvc ldvc_without_lcsa zegclip; do
  python train/train.py --config lite_objects --decoder "$decoder" --clip "$work/tuned/clip" --data "$work/data" \
    --output_dir "$work/objects_release/$decoder" --cache_dir "$work/cache" --resume_from_checkpoint latest \
    --set "init_from=$work/tuned/$decoder"
done
python -m recipes.lite.stuff_masks --data "$data" --work "$work"
for set in stuff-captions stuff-objects; do ln -sfn "$(realpath "$work")/$set" "$work/data/$set"; done
for decoder in ldvc ldvc_without_lcsa zegclip; do
  python train/train.py --config lite_stuff --decoder "$decoder" --clip "$work/tuned/clip" --data "$work/data" \
    --output_dir "$work/stuff_release/$decoder" --cache_dir "$work/cache" --resume_from_checkpoint latest \
    --set "init_from=$work/objects_release/$decoder"
done
python -m recipes.lite.average --before "$work/objects_release" --after "$work/stuff_release" --output "$work/release_mean"
ln -sfn "$(realpath "$work/tuned/clip")" "$work/release_mean/clip"
python train/evaluate.py --checkpoint "$work"/release_mean/{ldvc,ldvc_without_lcsa,zegclip} --data "$data" --sets msrc coco-mini \
  --plain_clip "$work/tuned/clip" --cache_dir "$work/cache" --calibrate
python -m recipes.lite.publish --release "$work/release_mean" --output assets/lite
