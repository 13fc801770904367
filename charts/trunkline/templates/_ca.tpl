{{/*
The CA of the inner links as {crt, key, digest}, the first two in base64: the one in the cluster, else a new one.
Several templates ask in one rendering, and all must get the same: hence the place in .Values.
*/}}
{{- define "trunkline.ca" -}}
{{- if not (hasKey .Values "renderedCA") }}
{{- $old := dig "data" (dict) (lookup "v1" "Secret" .Release.Namespace (printf "%s-ca" (include "trunkline.fullname" .))) }}
{{- $ca := dict "crt" (index $old "ca.crt") "key" (index $old "ca.key") }}
{{- if not (and $ca.crt $ca.key) }}
{{- $new := genCA (printf "%s CA" (include "trunkline.fullname" .)) 3650 }}
{{- $ca = dict "crt" ($new.Cert | b64enc) "key" ($new.Key | b64enc) }}
{{- end }}
{{- $_ := set $ca "digest" ($ca.crt | sha256sum | trunc 16) }}
{{- $_ := set .Values "renderedCA" $ca }}
{{- end }}
{{- .Values.renderedCA | toYaml }}
{{- end -}}
