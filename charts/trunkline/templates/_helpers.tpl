{{/* Names and labels. A release called trunkline gives trunkline-operator, another gives NAME-trunkline-operator. */}}
{{- define "trunkline.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "trunkline.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* What never changes about a component's pods: {root, component}. */}}
{{- define "trunkline.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* registry/name:tag, or the name itself when it is a whole reference already: {root, name}. */}}
{{- define "trunkline.image" -}}
{{- if contains "/" .name -}}
{{- .name -}}
{{- else -}}
{{- printf "%s/%s:%s" .root.Values.image.registry .name (.root.Values.image.tag | default .root.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{- define "trunkline.controlHost" -}}
{{ include "trunkline.fullname" . }}-gateway-control.{{ .Release.Namespace }}.svc
{{- end -}}

{{/* The Secret with the bearer between operator and gateways. */}}
{{- define "trunkline.tokenSecret" -}}
{{ .Values.operatorToken.existingSecret | default (printf "%s-link" (include "trunkline.fullname" .)) }}
{{- end -}}

{{/* Metadata of a component's pods: {root, component, values}. */}}
{{- define "trunkline.podMetadata" -}}
labels:
  {{- include "trunkline.selector" . | nindent 2 }}
  {{- with merge (dict) (.values.podLabels | default dict) .root.Values.commonLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- $annotations := .values.podAnnotations | default dict }}
{{- if and .root.Values.tls.enabled (not .root.Values.tls.certManager.enabled) }}
{{- /* Processes read certificates at their start, so a new CA rolls them. */}}
{{- $annotations = merge (dict "trunkline.dev/ca" (include "trunkline.ca" .root | fromYaml).digest) $annotations }}
{{- end }}
{{- with $annotations }}
annotations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* What all pods have in common, and where they may run: {root, component, values}. */}}
{{- define "trunkline.podSpec" -}}
enableServiceLinks: false
securityContext: {{- toYaml .root.Values.podSecurityContext | nindent 2 }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* One node's or zone's end is not the end of all: {root, component}. */}}
{{- define "trunkline.spread" -}}
topologySpreadConstraints:
  {{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "trunkline.selector" $ | nindent 8 }}
  {{- end }}
{{- end -}}
